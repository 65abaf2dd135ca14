output "namespace" {
  description = "The namespace, once it is there."
  value       = kubernetes_namespace_v1.this.metadata[0].name
}

output "objects" {
  description = "Kind and name of each object that was applied."
  value       = sort(keys(kubernetes_manifest.this))
}
