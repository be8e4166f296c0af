"""The Python API behind `import mmalign`: train, generate, score and compare with objects, for notebooks and scripts.

Every function does what the verb of the same name does on the command line, by the same code; objects (images, lists
of prompts, classes) are written to files under the output where the work needs files, so that it can be repeated.
"""
