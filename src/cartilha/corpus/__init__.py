"""Text as it comes: documents from files, the hub and the primer."""
