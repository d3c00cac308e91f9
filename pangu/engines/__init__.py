"""What trains a model: a contract, and one folder per engine that keeps it."""
