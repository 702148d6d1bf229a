"""How tokens are drawn: pure functions on tensors that know no network and no image."""
