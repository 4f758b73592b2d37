"""What algorithms share: the learner, the teacher, batches, the optimizer."""
