"""From sizes to weights: the axes table, slicing, permuting, checkpoint directories."""
