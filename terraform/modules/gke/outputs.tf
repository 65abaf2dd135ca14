output "name" {
  description = "Name of the cluster: `gcloud container clusters get-credentials NAME --region REGION`."
  value       = google_container_cluster.this.name
}

output "endpoint" {
  description = "Address of its API."
  value       = "https://${google_container_cluster.this.endpoint}"
}

output "ca_certificate" {
  description = "Certificate of its API, in PEM."
  value       = base64decode(google_container_cluster.this.master_auth[0].cluster_ca_certificate)
}
