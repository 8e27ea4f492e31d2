"""The engine of claims: what a claim is, how it is observed and decided, and what is made of it.

Records and the registry; topics, which are found; instances; `check`, its decisions and the tables,
pictures and curves made of verdicts; for the topics arguments, assumptions and what observers
share.  Imports no topic; topics import it.
"""
