"""Loading of models, preparation of data, and every measurement: profiles, checks, evaluations."""
