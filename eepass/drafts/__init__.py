"""Draft heads that travel: trained here for other servers, trained elsewhere for this engine."""
