//! The documents say what the program does.

use mirror_net::config::ClusterFile;
use serde_json::Value;
use std::path::Path;

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)).unwrap()
}

#[test]
fn the_cluster_file_in_the_document_is_one() {
    let text = read("docs/cluster-file.md");
    let mut blocks = text.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).peekable();
    assert!(blocks.peek().is_some());
    for block in blocks {
        ClusterFile::parse(block, "cluster-file.md").unwrap();
    }
}

fn fields(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                found.push(name.clone());
                fields(value, found);
            }
        }
        Value::Array(array) => array.iter().for_each(|value| fields(value, found)),
        _ => {}
    }
}

#[test]
fn every_json_field_is_documented() {
    let text = read("docs/mirrorctl-json.md");
    let words: Vec<&str> = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect();
    for snapshot in ["map.json", "status.json", "status-rejoining.json", "devices.json", "broadcast.json"] {
        let mut found = Vec::new();
        fields(&serde_json::from_str(&read(&format!("ctl/snapshots/{snapshot}"))).unwrap(), &mut found);
        for name in found {
            assert!(words.contains(&name.as_str()), "{snapshot}: {name} is not in docs/mirrorctl-json.md");
        }
    }
}
