"""What a person looks at: the gallery and the contact sheet of a run, and the faces in a photo. They change nothing but their
own file."""
