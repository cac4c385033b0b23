"""The user's loss as a function of the parameters: evaluated anywhere, without a trace."""
