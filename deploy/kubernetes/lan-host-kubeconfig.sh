#!/bin/sh
# Prints the kubeconfig of LAN hosts, with the rights of lan-host.yaml and a token that does not expire:
#
#   (umask 077; deploy/kubernetes/lan-host-kubeconfig.sh > kubeconfig)
#   (umask 077; deploy/kubernetes/lan-host-kubeconfig.sh NAMESPACE ACCOUNT > kubeconfig)
#
# Without arguments it uses the ServiceAccount that the ClusterRoleBinding of the role bridge-lan-host names, so it follows the
# namespace and the name prefix of an overlay. The server is that of the current context of kubectl; LAN hosts must reach it by
# the same name.
set -eu

if [ $# -eq 2 ]; then
    namespace=$1 account=$2
else
    found=$(kubectl get clusterrolebindings -o 'jsonpath={range .items[*]}{.roleRef.name}{" "}{.subjects[0].namespace}{" "}{.subjects[0].name}{"\n"}{end}' |
        awk '$1 ~ /bridge-lan-host$/ { print $2, $3; exit }')
    if [ -z "$found" ]; then
        echo "no ClusterRoleBinding has the role bridge-lan-host: apply lan-host.yaml first, or name namespace and account" >&2
        exit 1
    fi
    namespace=${found% *} account=${found#* }
fi

kubectl apply -f - >&2 <<END
apiVersion: v1
kind: Secret
metadata:
  name: $account
  namespace: $namespace
  annotations: {kubernetes.io/service-account.name: $account}
type: kubernetes.io/service-account-token
END
field() { kubectl -n "$namespace" get secret "$account" -o "jsonpath={.data.$1}"; }
# The control plane fills it in.
tries=30
until token=$(field token | base64 -d) && [ -n "$token" ]; do
    tries=$((tries - 1))
    if [ "$tries" -eq 0 ]; then
        echo "the Secret $account in $namespace has no token: does the ServiceAccount exist (lan-host.yaml)," \
            "and does kube-controller-manager run?" >&2
        exit 1
    fi
    sleep 1
done
server=$(kubectl config view --minify -o 'jsonpath={.clusters[0].cluster.server}')

cat <<END
apiVersion: v1
kind: Config
current-context: bridge
clusters: [{name: cluster, cluster: {server: "$server", certificate-authority-data: "$(field 'ca\.crt')"}}]
users: [{name: bridge-lan-host, user: {token: "$token"}}]
contexts: [{name: bridge, context: {cluster: cluster, user: bridge-lan-host}}]
END
