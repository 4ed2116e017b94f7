//! Cilium as the network plugin: its operator beside the control plane, its agent on each node. kube-proxy stays.
//!
//! The agent compiles its eBPF programs on the node and attaches them by TCX. Its pods' addresses are those of the node's pod
//! networks; packets between nodes are routed by the lab's network, or cross Cilium's own VXLAN overlay.

use std::path::Path;

use super::Options;

/// The arguments of the operator.
pub(super) fn operator(kubeconfig: &Path) -> Vec<String> {
    vec![
        format!("--k8s-kubeconfig-path={}", kubeconfig.display()),
        "--ipam=kubernetes".into(),
        "--operator-prometheus-serve-addr=127.0.0.1:9963".into(),
        "--operator-api-serve-addr=127.0.0.1:9234".into(),
    ]
}

/// Lines of a node's start script: they start the agent, and install the configuration of its CNI plugin when it is ready.
/// `programs` is the folder that `cargo xtask cluster` fills, `folder` that of the node.
pub(super) fn script(
    programs: &Path,
    folder: &Path,
    name: &str,
    kubeconfig: &Path,
    options: &Options,
) -> String {
    let (programs, folder, kubeconfig) = (programs.display(), folder.display(), kubeconfig.display());
    let routing = if options.overlay {
        "--routing-mode=tunnel --tunnel-protocol=vxlan"
    } else {
        "--routing-mode=native --auto-direct-node-routes"
    };
    let masquerade = options.masquerade;
    format!(
        r"mkdir -p /run/cilium {folder}/run-cilium
mount --bind {folder}/run-cilium /run/cilium
export PATH={programs}/bin:$PATH K8S_NODE_NAME={name} CILIUM_K8S_NAMESPACE=kube-system
forever cilium-agent cilium-agent --k8s-kubeconfig-path={kubeconfig} --cluster-name=default --devices=eth0 \
    {routing} --ipv4-native-routing-cidr=10.200.0.0/16 --ipv6-native-routing-cidr=fd20::/16 \
    --ipam=kubernetes --identity-allocation-mode=crd --enable-ipv4=true --enable-ipv6=true \
    --enable-ipv4-masquerade={masquerade} --enable-ipv6-masquerade={masquerade} --enable-bpf-masquerade=false \
    --kube-proxy-replacement=false --install-iptables-rules=true --enable-l7-proxy=false --enable-envoy-config=false \
    --enable-hubble=false --enable-health-checking=false --enable-gops=false \
    --bpf-root=/sys/fs/bpf --cgroup-root=/sys/fs/cgroup/unified --lib-dir={programs}/lib --state-dir=/run/cilium \
    --cni-chaining-mode=portmap --cni-exclusive=false --write-cni-conf-when-ready={folder}/cni/cilium.conflist &
# containerd overlooks the rename by which the agent installs a configuration.
{{ until [ -s {folder}/cni/cilium.conflist ]; do sleep 0.2; done; cp {folder}/cni/cilium.conflist {folder}/cni/conf/10-pods.conflist; }} &
"
    )
}
