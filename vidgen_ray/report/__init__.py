"""What a person looks at after a run: the gallery and the contact sheet. They read an output folder and change nothing in it
but their own file."""
