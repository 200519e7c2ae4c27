"""Closed forms and simulations behind the experiments; nothing here knows a network."""
