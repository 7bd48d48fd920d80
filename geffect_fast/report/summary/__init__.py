"""What a result says: numbers, verdicts and sentences, before anything lays them out."""
