"""Recorded autograd graphs (torch alone): private, what `linearised` stands on in eager code."""
