"""TensorFlow Datasets builders: they write each data set once, as array_record
files that are then read without TensorFlow.
"""
