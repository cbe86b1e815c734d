"""Rendered twins of the data sets: parameters in, images and the truth about every pixel out."""
