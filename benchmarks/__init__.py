"""Latency, peers and roofline: what is measured, and how."""
