render :
leave "$code"
