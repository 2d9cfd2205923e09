"""TinyHH: a small preference world in the format of HH-RLHF, with an annotator whose taste is known."""
