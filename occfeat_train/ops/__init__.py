"""Operations of the networks, each with a plain twin: lifting, attention, norms. No module with weights but the norm."""
