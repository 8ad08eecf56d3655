"""How good samples are: mathematics on features and frames, without data sets, networks or model folders."""
