"""Which stage is weak: a model or the checkpoints of a run, judged stage by stage."""
