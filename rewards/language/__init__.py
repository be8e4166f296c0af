"""What rewards know of English: grammar, contrast prompts, GenEval's tasks."""
