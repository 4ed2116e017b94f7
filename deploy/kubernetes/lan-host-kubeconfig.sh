#!/bin/sh
# Prints the kubeconfig of LAN hosts, with the rights of lan-host.yaml and the token of lan-host-token.yaml, which it applies:
#
#   (umask 077; deploy/kubernetes/lan-host-kubeconfig.sh > kubeconfig)
#
# The server is that of kubectl's current context, under the name that LAN hosts must reach it by, too.
set -eu

kubectl apply -f "$(dirname "$0")/lan-host-token.yaml" >&2
field() { kubectl -n bridge-system get secret bridge-lan-host -o "jsonpath={.data.$1}"; }
# The control plane fills it in.
tries=30
until token=$(field token | base64 -d) && [ -n "$token" ]; do
    tries=$((tries - 1))
    if [ "$tries" -eq 0 ]; then
        echo "the Secret bridge-lan-host has no token: is there a ServiceAccount bridge-lan-host (lan-host.yaml)," \
            "and does kube-controller-manager run?" >&2
        exit 1
    fi
    sleep 1
done
server=$(kubectl config view --minify -o 'jsonpath={.clusters[0].cluster.server}')

cat <<EOF
apiVersion: v1
kind: Config
current-context: bridge
clusters: [{name: cluster, cluster: {server: "$server", certificate-authority-data: "$(field 'ca\.crt')"}}]
users: [{name: bridge-lan-host, user: {token: "$token"}}]
contexts: [{name: bridge, context: {cluster: cluster, user: bridge-lan-host}}]
EOF
