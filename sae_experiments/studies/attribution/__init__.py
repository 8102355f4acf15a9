"""Attribution graphs from the tokens to the logits, checked by intervention."""
