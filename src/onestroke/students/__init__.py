"""What is done with a finished student: kept, called, steered, merged, exported, compared, described."""
