found=$(versions 2>&1) ||
    bad_node "vidgen does not run on $SLURMD_NODENAME: ${found##*$'\n'}. Install it, or Apptainer for --container, where all nodes see it"
render :
leave "$code"
