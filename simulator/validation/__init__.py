"""Forecasts against published measurements, with the error of every row."""
