"""Jobs: the entry points that a user types, each short enough to read at one sitting."""
