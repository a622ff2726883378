"""Files of chats to conversations: formats, faults, rows at random."""
