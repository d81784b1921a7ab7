"""The demo: a small real model, edited and served."""
