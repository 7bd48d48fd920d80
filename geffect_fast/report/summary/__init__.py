"""Numbers, verdicts and sentences on a result, before tables, figures or pages lay them out."""
