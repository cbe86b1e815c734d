"""Procedural twins with ground truth: parameters in, images and masks out."""
