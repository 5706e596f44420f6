"""The report's sections, one module a concept: each is a function of the subject that gives a `Section`."""
