"""torch operations whose higher derivatives are wrong or missing, and the forms that are right.

Torch only: `_torch.py` holds the table and the context that puts the right forms in place while the
user's function runs. docs/decisions.md says how each fault is known; tests/test_repairs.py shows
each, and fails when a torch version has mended one.
"""
