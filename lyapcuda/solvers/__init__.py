"""The Hessian at one θ as an operator, and algorithms on it: eigenvalues, trace, density."""
