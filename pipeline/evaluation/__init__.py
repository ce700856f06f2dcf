"""What a run did: figures of one result, and the report of a whole run."""
