use super::*;
#[test]
fn try_it() {
    let text = r#"
role: node
networks:
  pods: [10.200.1.0/24]
  external: [192.168.31.0/24]
  nods: [10.1.1.1]
enforcement: {mode: enforced, timeouts: {icmp: 30}}
rules:
  - name: a
    direction: inbound
    protocol: tcp
    ports: [40002, "60100-60001", 70000]
  - {name: a, direction: inbound, protocol: icmp, ports: 80, external: 10.1.1.0/24}
nodePorts: {allow: [30080, 1]}
kubernetes:
"#;
    match parse(text, Some("/etc/bridge/bridge.yaml".as_ref())) {
        Ok(loaded) => println!("{}", loaded.config.effective().to_yaml().unwrap()),
        Err(error) => println!("{error}"),
    }
    println!("{}", serde_json::to_string_pretty(&schema()).unwrap());
}
