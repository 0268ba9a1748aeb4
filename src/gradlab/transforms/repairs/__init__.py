"""torch operations whose higher derivatives are wrong or missing, and the forms that are right.

Torch only: `_torch.py` holds the table and the context that puts the right forms in place while the
user's function runs. docs/decisions.md says how each fault is known; tests/test_repairs.py shows it on
the pinned torch version, and that every nest of a gradlab operation is right on all of them.
"""
