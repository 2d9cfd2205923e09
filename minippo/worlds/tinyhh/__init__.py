"""TinyHH: a small preference world in the format of HH-RLHF; its annotator's taste is known."""
