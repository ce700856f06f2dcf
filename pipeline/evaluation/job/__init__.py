"""An evaluation as a job: edit, measure, judge, compare; what is done is never done again."""
