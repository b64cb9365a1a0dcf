"""What resuming needs: the states of optimizers, schedulers and random numbers, found, checked and restored."""
