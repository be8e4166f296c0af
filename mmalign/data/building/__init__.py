"""Making preference data: sample images, mix in real ones, write captions that do not fit."""
