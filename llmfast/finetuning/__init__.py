"""A model that exists, taught something new: adapters, or some or all of its weights, over the same trainer."""
