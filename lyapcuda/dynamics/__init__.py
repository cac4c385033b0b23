"""Separations that grow from step to step, and what their growth says of the Hessian."""
