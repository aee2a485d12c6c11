"""Remaining-length predictors: what a policy believes about how much a request will still generate."""
