"""The engine of claims: records, registry, instances, decisions, curves and validation.

Imports no topic; topics import it.
"""
