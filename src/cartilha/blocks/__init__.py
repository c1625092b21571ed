"""Documents to fixed-size blocks of inputs and targets, in an order that is a pure function of seed and epoch."""
