"""Formulas and torchmetrics `Metric`s: what is measured, with no model being asked and no file being written."""
